guard() { # Slurm's signal goes to steps; the setup is none, and is ended here when the limit comes near
  local seconds pause=0
  while sleep "$pause"; do
    pause=60
    seconds=$(left) || continue
    [ "$seconds" -gt @signal_lead_s@ ] || break
    pause=$((seconds - @signal_lead_s@))
  done
  kill -USR2 "$(cat "$run/.setup")"
}
