"""Engines under one small protocol (protocol.py), each in a process, and where needed an environment, of its own."""
