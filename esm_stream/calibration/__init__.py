"""Forward passes of the experts on their proxies, block by block, and what hooks see in them.

proxies.py   samples of a task -> model inputs, in micro-batches
skeleton.py  a model without weights; its blocks; which checkpoint tensor is which parameter
conversion.py  parameters that transformers assembles at load, and where their parts are stored
trace.py     how the forward can be streamed, and which matrices it uses, found out without weights
steps.py     blocks in order, and modes
passes.py    one forward in which somebody else answers for the blocks
suspended.py several passes side by side, so that each block is loaded once
lazy.py      parameters that are there when the forward asks for them
arguments.py nested values (arguments and outputs of blocks, model inputs), and them as files
hooks.py     what every matrix of a module is multiplied with
moments.py   running second moments of what hooks see
"""
