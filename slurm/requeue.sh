begin() { # a new submission has all its tries
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$run/failures"
}
again() { # back into the queue, without the nodes that were found bad; Slurm ends this script soon after
  log "requeue: $*"
  trap '' TERM
  scontrol requeue "$job" || exit $rc
  leave_out "$job"
  sleep 60
  exit $rc
}
