"""The chat page's side of the server: kept conversations, answers that outlive their readers, files."""
