"""What those who run the server look at: health, metrics, logs."""
