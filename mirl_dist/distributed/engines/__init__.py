"""What holds a rank's weights and updates them: replicas (DDP), or a network dealt out over the ranks (ZeRO, FSDP2)."""
