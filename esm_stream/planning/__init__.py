"""From a manifest to a plan, by headers alone.

opening.py     manifest -> checkpoints, skeleton and trace; every mistake of every input at once
treatments.py  which tensor is merged how: rules, targets, matrices made of one or more tensors
tasks.py       the tasks with what they read, write, cost, and the fingerprints that decide resume
plan.py        the plan itself, as data
"""
