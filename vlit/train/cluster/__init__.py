"""What a run does about the machines it is on: compare them, keep others out, notice a hang, stop as schedulers want."""
