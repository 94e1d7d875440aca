guard() { # Slurm's signal goes to steps; the setup is none, and is ended here when the limit comes near
  local seconds setup pause=0
  while sleep "$pause"; do
    pause=60
    seconds=$(left) || continue
    [ "$seconds" -gt @signal_lead_s@ ] || break
    pause=$((seconds - @signal_lead_s@))
  done
  setup=$(cat "$run/.setup" 2>/dev/null) && kill -USR2 "$setup"
}
