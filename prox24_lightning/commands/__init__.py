"""The former home of ``packed_folder``, kept because model cards that users have published name it."""
