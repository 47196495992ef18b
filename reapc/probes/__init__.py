"""Asking the drivers: NVIDIA's through nvidia-ml-py, AMD's through amdsmi, rocm-smi or sysfs, Apple's through sysctl.

None of them is required: what is missing is said in the findings.
"""

from reapc.probes.amd import amd_cards
from reapc.probes.apple import apple
from reapc.probes.host import Card, Host, available_ram
from reapc.probes.nvidia import nvidia_cards

__all__ = ["Card", "Host", "amd_cards", "apple", "available_ram", "nvidia_cards"]
