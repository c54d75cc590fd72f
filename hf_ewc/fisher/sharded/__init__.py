"""The Fisher where each process holds a part of the parameters (FSDP2, ZeRO-3)."""
