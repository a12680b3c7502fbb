"""From a conversation to events: the served models, what they are asked, and who looks on."""
