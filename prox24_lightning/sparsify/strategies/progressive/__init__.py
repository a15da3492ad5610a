"""Block after block by the layer-wise loss, while the rest of the model trains on."""
