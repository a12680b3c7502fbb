"""From files to batches: what a model reads before it can talk.

    readers → dedup, minhash, decontaminate → fim → store (tokens on disk) → packing: step → samples

`debian` makes the reference corpus, `tokenizer` the vocabulary, `bits` the measure: bits a byte of its held-out part.
"""
