begin() { # a new submission has all its tries
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$run/failures"
}
again() { # back into the queue, without the nodes that were found bad; Slurm ends this script soon after
  local answer
  log "requeue: $*"
  trap '' TERM
  until answer=$(scontrol requeue "$job" 2>&1); do # the controller may be away; the time limit ends this
    case $answer in
      *"Invalid job id"* | *"already completing or completed"* | *"presently disabled"* | *"ermission denied"*)
        log "requeue refused: $answer"
        exit $rc ;;
    esac
    log "requeue not taken, tried again in 10 s: $answer"
    sleep 10
  done
  leave_out "$job" || { sleep 10; leave_out "$job"; }
  sleep 60
  exit $rc
}
