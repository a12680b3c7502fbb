"""Programs that measure. Each prints one JSON line; `--append` adds it to results.jsonl."""
