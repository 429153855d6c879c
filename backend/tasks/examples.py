"""Media small enough to stand in a task's example, in base64."""

# 16 x 16 pixels, half of them red and half blue.
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAABlBMVEXIHh4eHshgjNd+AAAAEElEQVR42mNg+M/EwEA8"
    "AgAw0gEe0P1L1QAAAABJRU5ErkJggg=="
)
# 30 ms of A above middle C: WAV, 8 bits, 8 kHz.
SOUND = (
    "UklGRhQBAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YfAAAACAob/W4uLXwqSDYUIrHhwmO1h5m7rS4OPaxq"
    "qJZ0cvHxwkN1JzlbXP3+Pcy7CPbU0yIRwhMk1tj7DL3OPfz7WVc1I3JBwfL0dniarG2uPg0rqbeVg7JhweK0Jhg6TC1+Li"
    "1r+hf15AKR0dKD1bfJ691OHj2cSnhmRFLR8cJTlVdpi40ODj28itjGpKMCAcIzRPcJKyzd7k3s2yknBPNCMcIDBKaoytyN"
    "vj4NC4mHZVOSUcHy1FZIanxNnj4dS9nnxbPSgdHSlAXoChv9bi4tfCpINhQiseHCY7WHmbutLg49rGqolnRy8fHCQ3UnOV"
    "tc8="
)
