"""One file per stage of a merge: what a task of that stage reads, computes and writes.

inputs.py   calibration data -> model inputs
stem.py     model inputs -> hidden states before the first block, and what every block is handed
forward.py  one block of one expert: moments by hooks, factors to the store, hidden states on
merge.py    factors of all experts -> merged update of one matrix, and its norm (pass 1)
scale.py    norms of one role -> scales
write.py    base + scale * update -> a place in a reserved shard (pass 2); sealing
finish.py   index, model files, card, report, and complete.json last of all
"""
