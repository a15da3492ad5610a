"""What is summed up over calibration inputs and outputs: Hessians, second moments, errors that count by token."""
