#!/bin/sh
# Moved to tools/gpu_check.sh; this forwards to it.
exec sh "$(dirname "$0")/../tools/gpu_check.sh" "$@"
