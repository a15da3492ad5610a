"""The import path of ``packed_folder`` that older model cards name."""
