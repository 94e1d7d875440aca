"""What a run costs, counted from its config alone. Imports no torch.

`params` lists parameters, `flops` counts operations, `mixers` counts operations and activations of every mixer;
`holdings` says what a rank holds, `device_memory` its bytes, `comm` the bytes it sends; `updates` has the cost of an
update and its owner, `hardware` the devices, `estimate` the time, `search` the layouts, and `report` the whole plan.
"""
