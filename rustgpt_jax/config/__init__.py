"""Config schema, validation, and the partition into static and traced values."""
