"""Event loops in threads of their own, for foreign coroutines. Torch-free.

The threads are daemons: a loop that a call blocks can be left behind, and ends with the process at the latest.
"""

from __future__ import annotations

import asyncio
import threading


def start_loop(name: str) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """A running loop and its thread, called `name`. `loop.call_soon_threadsafe(loop.stop)` ends both, and all tasks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_live, args=(loop,), name=name, daemon=True)
    thread.start()
    return loop, thread


def _live(loop: asyncio.AbstractEventLoop) -> None:
    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(end())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
