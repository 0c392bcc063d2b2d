"""From any preference file to packed token batches: records, sources, template, encode, packing."""
