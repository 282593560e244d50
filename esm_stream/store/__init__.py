"""The work directory: factors in Zarr, markers that say what is complete, the lock, hidden states.

work/  lock  plan.json  inputs.json  events.jsonl
       inputs/<expert>.safetensors      model inputs drawn for an expert, in micro-batches
       hidden/<expert>/...              what blocks are handed; the latest block's output
       factors.zarr/<matrix>/...        bases, coordinates, spectra; merged updates
       done/<task>.json                 one marker per finished task
"""
