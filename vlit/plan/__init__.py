"""What a run will need before it starts: parameters, memory, time, and settings that fit."""
