begin() { # nothing, if an earlier job of the chain gave up
  case $(outcome) in
    "gave up"*) log "an earlier job $(outcome); to try again, remove $run/outcome and $run/failures"; exit 1 ;;
  esac
}
again() { # by the next job of the chain
  log "left to the next job: $*"
  exit $rc
}
