# A CPU image that serves models:   docker build -t manyhands . && docker run -p 8000:8000 -v /models:/models:ro \
#   -e MANYHANDS_KEY=secret manyhands /models/NAME
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/manyhands \
 && /opt/manyhands/bin/pip install --no-cache-dir -c constraints.txt torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    --extra-index-url https://pypi.org/simple \
 && /opt/manyhands/bin/pip install --no-cache-dir -c constraints.txt '.[serve,hub]'

FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home manyhands
COPY --from=build /opt/manyhands /opt/manyhands
ENV PATH=/opt/manyhands/bin:$PATH
USER manyhands
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD \
  ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
STOPSIGNAL SIGTERM
# The key comes from the environment, so that it stands in no command line.
ENTRYPOINT ["sh", "-c", "umask 077; test -n \"$MANYHANDS_KEY\" || { echo 'set MANYHANDS_KEY: the key that requests must carry' >&2; exit 2; }; printf '%s' \"$MANYHANDS_KEY\" > /tmp/key; unset MANYHANDS_KEY; exec manyhands serve \"$@\" --host 0.0.0.0 --api-key-file /tmp/key", "manyhands"]
