#!/bin/bash
# Inside a build, `layers.sh`: each folder of /opt as the whole content of a layer. COPY gives the time of the build to a
# folder that it makes, and keeps the time of one that it finds in what it copies.
set -euo pipefail
for folder in hscr project; do
  mkdir --parents "/layers/$folder/opt"
  mv "/opt/$folder" "/layers/$folder/opt/"
  touch --date="@$SOURCE_DATE_EPOCH" "/layers/$folder/opt"
done
