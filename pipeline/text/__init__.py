"""What `pipeline.tokenize` is made of: tokenizers, encoding on several processes, packing into sequences."""
