"""What every room stands on: files, processes, tables, copies of modules."""
