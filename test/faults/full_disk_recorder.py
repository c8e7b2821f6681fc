"""The recorder on a disk that is full after 400 kB: ``python -m full_disk_recorder --ros-args ...``."""

from __future__ import annotations

import resource

from omega_qvla_ros.nodes import recorder_node

FULL_AFTER_BYTES = 400_000

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AFTER_BYTES, resource.RLIM_INFINITY))
    recorder_node.main()
