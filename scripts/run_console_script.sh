#!/bin/sh
# Installed as lib/omega_qvla_ros/<name> by pip: launch_ros and ros2 run look there, pip puts console scripts in bin.
prefix=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd) || exit 1
exec "$prefix/bin/$(basename -- "$0")" "$@"
