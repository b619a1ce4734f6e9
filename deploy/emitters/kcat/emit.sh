#!/bin/sh
# Emits the usage of one model call with kcat. Needs kcat, and SPENDFUSE_BOOTSTRAP_SERVERS unless it is local.
set -eu

workspace=${SPENDFUSE_WORKSPACE:-acme} team=${SPENDFUSE_TEAM:-research} agent=${SPENDFUSE_AGENT:-planner-7}
run=${SPENDFUSE_RUN:-run-1}
# One id for each call: the same id twice is charged once.
id=${1:-kcat:$(date -u +%s)-$$}
now=$(date -u +%Y-%m-%dT%H:%M:%SZ)

printf '{"v":1,"id":"%s","ts":"%s","workspace":"%s","team":"%s","agent":"%s","run":"%s","provider":"anthropic","model":"claude-sonnet-4-6","tokens":{"input":200,"cache_read":100000,"output":100},"source":"kcat"}\n' \
  "$id" "$now" "$workspace" "$team" "$agent" "$run" |
  kcat -P -b "${SPENDFUSE_BOOTSTRAP_SERVERS:-127.0.0.1:9092}" -t spendfuse.usage.v1 \
    -k "$workspace/$team/$agent" -X acks=all

echo "emitted $id"
