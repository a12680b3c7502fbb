"""The APIs that programs speak, each an encoder over the one event stream."""
