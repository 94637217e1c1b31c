"""The child process of `template.py`: renders one chat template under limits. Run as a script; imports nothing of ours.

Reads {"path", "template", "values", "memory", "seconds", "output"} as JSON on stdin; writes one JSON object on stdout: {"text"},
{"refused": why} or {"limit": which}.
"""

import datetime
import json
import sys


def limit(memory, seconds):
    """Caps address space and CPU time of this process, where the platform can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def environment():
    """The dialect of chat templates: sandboxed, loop controls, `raise_exception`, `strftime_now`, plain `tojson`, `generation` blocks."""
    import jinja2
    from jinja2 import ext, sandbox

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a variable of instances

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    for name in ("lipsum", "cycler", "joiner"):
        made.globals.pop(name, None)
    made.globals.update(
        raise_exception=raise_exception, strftime_now=lambda form: datetime.datetime.now().strftime(form)
    )
    return made


def render(job):
    """The text, at most `output` characters of it."""
    import jinja2

    parts, size = [], 0
    try:
        for part in environment().from_string(job["template"]).generate(**job["values"]):
            size += len(part)
            if size > job["output"]:
                return {"limit": f"more than {job['output']:,} characters of output"}
            parts.append(part)
    except MemoryError:
        return {"limit": f"more than {job['memory']:,} bytes of memory"}
    except RecursionError:
        return {"limit": "too deep a recursion"}
    except jinja2.TemplateError as error:
        return {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
    except Exception as error:  # whatever the template did to its values is the template's fault
        return {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"text": "".join(parts)}


if __name__ == "__main__":
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    environment()  # import before the limits: they are for the template, not for the libraries
    limit(job["memory"], job["seconds"])
    json.dump(render(job), sys.stdout)
