"""What every floor above may use: files, records, texts, random numbers, optional packages. Nothing here knows a model."""
