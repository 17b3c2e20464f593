"""Engines that hold and update a rank's weights: replicated (DDP) or sharded over the ranks (ZeRO, FSDP2)."""
