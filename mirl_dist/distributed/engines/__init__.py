"""Engines hold a rank's weights and update them: replicas (DDP), or a network sharded over the ranks (ZeRO, FSDP2)."""
