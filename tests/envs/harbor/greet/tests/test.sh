#!/bin/bash
mkdir -p /logs/verifier
if [ "$(cat /tmp/app/greeting.txt)" = "$WANTED" ]; then
    echo 1 > /logs/verifier/reward.txt
else
    echo 0 > /logs/verifier/reward.txt
fi
