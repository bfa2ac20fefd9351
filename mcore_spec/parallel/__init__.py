"""Process groups, the CPU runtime, collectives and sharding.

The only room that knows ``megatron.core.parallel_state`` and ``transformer_engine``.
"""
