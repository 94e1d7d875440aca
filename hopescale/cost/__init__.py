"""Cost of a run, counted from its config alone. Imports no torch.

`params` lists parameters and `flops` counts operations of a model; `mixers` names, by kind of mixer, the files that
count its parameters, operations and activations: `self_modifying`, `attention`, `linear_attention`, `ttt`.
`holdings` says what a rank holds, `device_memory` its bytes, `comm` the bytes it sends; `updates` has the cost of an
update and its owner, `hardware` the devices, `estimate` the time, `search` the layouts, and `report` the whole plan.
"""
