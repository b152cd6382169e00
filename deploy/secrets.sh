#!/usr/bin/env bash
# Makes the secrets of docker-compose.yml, once: random, one file each, in ./secrets or the folder given.
# Compose mounts the files with the rights they have here, and the containers run under other numbers than this
# user: the files may be read by all, in a folder that only this user can enter.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-secrets}
mkdir -p "$folder"
chmod 700 "$folder"

secret() { # secret NAME: its value from standard input, unless it exists
  local file=$folder/$1
  [ -e "$file" ] && return
  cat > "$file"
  chmod 444 "$file"
  echo "made $file"
}
random() { head -c 32 /dev/urandom | base64 | tr -d '+/=\n'; }

random | secret postgres_password
printf 'postgresql+psycopg://hscr:%s@postgres:5432/hscr' "$(cat "$folder/postgres_password")" | secret hscr_database_url
random | secret hscr_study_secret
printf 'hscr_sk_%s' "$(random)$(random)" | secret hscr_first_key
random | secret grafana_password
