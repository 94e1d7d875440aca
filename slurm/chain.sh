begin() { # nothing, if an earlier job of the chain gave up
  case $(outcome) in
    "gave up"*) log "an earlier job $(outcome); to try again, remove $run/outcome and $run/failures"; exit 1 ;;
  esac
}
again() { # by the next job of the chain, without the nodes that were found bad
  local next
  log "left to the next job: $*"
  for next in $(sed -n 's/^{"job": "\([0-9]*\)".*/\1/p' "$run/jobs.jsonl" 2>/dev/null); do
    [ "$next" -le "$job" ] || leave_out "$next"
  done
  exit $rc
}
