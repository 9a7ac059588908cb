"""The disk and the object store: dataset table, real images, artifacts."""
