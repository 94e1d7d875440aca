begin() { # a new submission has all its tries
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$run/failures"
}
excluded() { # those that the job leaves out already, and those that were found bad
  scontrol show job -o "$job" | grep -o ' ExcNodeList=[^ (]*' | cut -d= -f2 | grep .
  sort -u "$run/bad_nodes"
}
again() { # back into the queue, without the nodes that were found bad; Slurm ends this script soon after
  log "requeue: $*"
  trap '' TERM
  scontrol requeue "$job" || exit $rc
  [ ! -s "$run/bad_nodes" ] || scontrol update JobId="$job" ExcNodeList="$(excluded | paste -sd,)"
  sleep 60
  exit $rc
}
