#!/bin/sh
# Shows every command from the first one on, then follows; further arguments go to kcat (-e: end at the last one).
# To look at, not to obey: kcat does not check signatures.
set -eu

exec kcat -C -q -b "${SPENDFUSE_BOOTSTRAP_SERVERS:-127.0.0.1:9092}" -t spendfuse.commands.v1 -o beginning \
  -X fetch.wait.max.ms=20 -f '%o %k %s\n' "$@"
