"""What `pipeline.train` is made of: settings, one dictionary, dictionaries that step together, several processes."""
