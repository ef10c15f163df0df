"""What every floor above may use: files, records, texts, optional packages. Nothing here knows a model."""
