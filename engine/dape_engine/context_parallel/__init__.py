"""One sequence's keys over several processes: rank 0 is the engine, the others follow its steps.

Every rank has the whole model and computes every row; keys and values are spread, see
`dape_kernels.distributed`. Rank 0 tells the others what to compute through pipes, at which they may wait for
days; the attention's collectives run over gloo between CPUs and NCCL between GPUs.
"""
