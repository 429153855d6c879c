# Crane on CPU or CUDA: the normal torch wheel carries CUDA's libraries, so a GPU needs only the
# host's driver and NVIDIA's container toolkit. Weights are not in the image; see HF_HOME.
FROM python:3.11-slim

# Weights from the Hub go to HF_HOME, the service's own files to CRANE_DATA_DIR: both are volumes.
ENV PYTHONUNBUFFERED=1 \
    CRANE_BIND=0.0.0.0:8000 \
    CRANE_DATA_DIR=/var/lib/crane \
    HF_HOME=/var/cache/huggingface

# A volume begins with what the image has at its place, owner included.
RUN useradd --system --uid 10001 --create-home crane \
    && install -d -o crane -g crane /var/lib/crane /var/cache/huggingface

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY wsgi.py gunicorn.conf.py models.yaml ./
COPY backend ./backend

USER crane
VOLUME ["/var/cache/huggingface", "/var/lib/crane"]
EXPOSE 8000

# Whether a call would be taken; a 503 of /readyz makes urlopen raise, and python exit with 1.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['CRANE_BIND'].rpartition(':')[2] + '/readyz', timeout=4)"]

# gunicorn is process 1, so the signal is its own: it takes no more calls, ends those it has, then
# the engine. Give it longer than CRANE_REQUEST_TIMEOUT: docker stop --time 150.
STOPSIGNAL SIGTERM
CMD ["gunicorn", "wsgi:app"]
