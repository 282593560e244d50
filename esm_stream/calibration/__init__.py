"""Forward passes of the experts on their proxies, block by block, and what hooks see in them.

proxies.py   samples of a task -> model inputs, in micro-batches
skeleton.py  a model without weights; its blocks; which checkpoint tensor is which parameter
conversion.py  parameters that transformers assembles at load, and where their parts are stored
chain.py     may the blocks run one after the other, each from its predecessor's output alone?
arguments.py what the skeleton hands to each block, and hidden states, as files
hooks.py     what every matrix of a module is multiplied with
moments.py   running second moments of what hooks see
"""
